#include "recurrent.hpp"
#include <cmath>
#include <vector>
namespace respike {
template <class T> void far(Level, int, const FarJob<T>* jobs, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) { const auto& j = jobs[i]; const auto F=j.features,K=j.key_dim,V=j.value_dim;
    for (std::int64_t t=0;t<j.tokens;++t) {
      if (t<j.real) { for(std::int64_t x=0;x<F*(V+1);++x) j.memory[x]*=std::exp(j.log_decay);
        if (t>=j.first_real) { std::vector<double> s(F); double m=-1e300,z=0;
          for(std::int64_t f=0;f<F;++f){double d=j.key_bias[f];for(std::int64_t c=0;c<K;++c)d+=double(j.key_weight[f*K+c])*load(j.k+t*j.k_stride+c);s[f]=d;m=std::max(m,d);}
          for(auto&a:s){a=std::exp(a-m);z+=a;}
          for(std::int64_t f=0;f<F;++f){for(std::int64_t c=0;c<V;++c)j.memory[f*(V+1)+c]+=float(s[f]/z*load(j.v+t*j.v_stride+c)); j.memory[f*(V+1)+V]+=float(s[f]/z);} } }
      for(std::int64_t h=0;h<j.heads;++h){ if(std::isinf(j.beta[h]))continue;
        std::vector<double> w(F); double m=-1e300; for(std::int64_t f=0;f<F;++f){double d=j.beta[h];for(std::int64_t c=0;c<K;++c)d+=double(j.query_weight[(h*F+f)*K+c])*load(j.q+t*j.q_stride+h*K+c);w[f]=d;m=std::max(m,d);}
        std::vector<double> o(V+1,0.0); for(std::int64_t f=0;f<F;++f)for(std::int64_t c=0;c<=V;++c)o[c]+=std::exp(w[f]-m)*j.memory[f*(V+1)+c];
        if(o[V]<=0)continue; double fm=std::log(o[V])+m, sh=1/(1+std::exp(double(j.near_log_mass[t*j.mass_stride+h])-fm));
        for(std::int64_t c=0;c<V;++c){T*p=j.near+t*j.near_stride+h*V+c; double a=load(p); store(p,float(a+sh*(o[c]/o[V]-a)));} } } } }
template void far(Level,int,const FarJob<float>*,std::int64_t);
template void far(Level,int,const FarJob<bf16>*,std::int64_t);
}
